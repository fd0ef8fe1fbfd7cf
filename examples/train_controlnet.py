"""Trains a ControlNet on Stage C: `accelerate launch examples/train_controlnet.py --config FILE`."""

from stable_cascade.config import run_main
from stable_cascade.trainers.controlnet import main

if __name__ == "__main__":
    run_main(main)
