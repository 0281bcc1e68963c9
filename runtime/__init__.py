"""What runs on the device: pictures and prompts in, tokens out. Never torch, never an engine by name."""
