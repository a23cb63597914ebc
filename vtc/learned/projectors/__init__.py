"""Projectors: modules between a vision encoder and a language model that give it fewer tokens."""
