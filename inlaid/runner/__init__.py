"""The device's side of a step."""
