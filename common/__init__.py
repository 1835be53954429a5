"""What every technique shares and a reader would skip: text, file names, state, conversion, the log line."""
