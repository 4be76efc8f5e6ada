"""What matters: label-free importance of every unit, from unlabeled batches."""
