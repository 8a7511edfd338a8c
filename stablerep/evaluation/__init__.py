"""Protocols that score frozen features on labelled images, and the table that reports them."""
