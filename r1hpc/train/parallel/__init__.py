"""Coordinate ranks: process group, engine, compression."""
