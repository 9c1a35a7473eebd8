"""Passes over finished images, one file each."""
