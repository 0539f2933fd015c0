"""Forward passes behind one seam: sequences in, raw rewards out."""
