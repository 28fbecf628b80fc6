"""LoRA adapters: PEFT files read, checked, identified by content and laid out in rank-exact pages."""
