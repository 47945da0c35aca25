"""Parameters and memory of any rank of any layout, counted without allocating them."""
