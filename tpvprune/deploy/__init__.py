"""What follows a pruned model out of the house: other formats, milliseconds, pages to read."""
