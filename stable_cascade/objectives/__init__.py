"""What one training step computes: clean pictures and captions in, one loss per sample out."""
