"""Pooled multi-subject stores: what was shown, what was measured, and what a frozen encoder makes of the images."""
