"""Text and conversations into training data, and training data into batches."""
