"""Figures that people compare policies by. Pure functions of counts."""
