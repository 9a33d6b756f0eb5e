"""Measures whether training helped: the gap between full image and crop, before and after."""
