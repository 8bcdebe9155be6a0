"""Recognise your own videos with a trained model."""
