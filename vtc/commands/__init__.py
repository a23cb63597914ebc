"""The commands of `vtc`, and what they take."""
