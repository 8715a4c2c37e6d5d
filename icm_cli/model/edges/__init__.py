"""Networks that bring a head's alpha to the edges of its source, one file each."""
