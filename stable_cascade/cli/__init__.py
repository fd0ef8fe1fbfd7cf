"""The `stable-cascade` command."""
