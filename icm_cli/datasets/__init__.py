"""Published matting datasets: their files, groups and scoring conventions."""
