"""Trains Stage B, image reconstruction: `accelerate launch examples/train_decoder.py --config FILE`."""

from stable_cascade.config import run_main
from stable_cascade.trainers.decoder import main

if __name__ == "__main__":
    run_main(main)
