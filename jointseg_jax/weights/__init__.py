"""Conversion of reference weights into our parameter trees."""
