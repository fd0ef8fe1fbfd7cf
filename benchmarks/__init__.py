"""Ours and a peer side by side: `make bench`, `make bench-gpu`."""
