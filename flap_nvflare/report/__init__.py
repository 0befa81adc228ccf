"""Pages of finished and unfinished runs, made from the files in their folders alone."""
