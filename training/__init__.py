"""Training, evaluation and offline sampling."""
