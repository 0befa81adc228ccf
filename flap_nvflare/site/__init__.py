"""What a hospital's IT has at its site: its file, limits, reasons for a refusal, logs."""
