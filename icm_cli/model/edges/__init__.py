"""What brings the edges of a head's alpha to those of the source, one file each."""
