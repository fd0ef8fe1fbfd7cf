"""Trains a LoRA, and tokens if asked, on Stage C: `accelerate launch examples/train_lora.py --config FILE`."""

from stable_cascade.config import run_main
from stable_cascade.trainers.lora import main

if __name__ == "__main__":
    run_main(main)
