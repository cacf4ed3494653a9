"""Trained models to play with, in the browser."""
