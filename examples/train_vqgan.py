"""Trains Stage A, the autoencoder: `accelerate launch examples/train_vqgan.py --config FILE`."""

from stable_cascade.config import run_main
from stable_cascade.trainers.vqgan import main

if __name__ == "__main__":
    run_main(main)
