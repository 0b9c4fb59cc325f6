"""What is stored on disk for training: encoded records, cached target outputs, labelled draft tokens."""
