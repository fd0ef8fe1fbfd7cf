"""Trains Stage C on images with captions: `accelerate launch examples/train_text_to_image.py --config FILE`."""

from stable_cascade.config import run_main
from stable_cascade.trainers.text_to_image import main

if __name__ == "__main__":
    run_main(main)
