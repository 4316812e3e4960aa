"""What a smaller cache costs a trained model: every way to convert it, at every cache ratio, in one table."""
