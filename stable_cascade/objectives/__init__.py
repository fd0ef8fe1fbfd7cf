"""What one training step computes: clean images and captions in, one loss per sample out."""
