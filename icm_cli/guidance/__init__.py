"""What a person says about one image: points, boxes, strokes and areas, and the files that contain them."""
