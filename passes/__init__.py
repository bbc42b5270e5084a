"""The library of passes."""
