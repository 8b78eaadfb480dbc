"""The published numbers beside ours: a table of a paper a file, with what a finished comparison found."""
