"""Pure tensor functions, free of verl, one concept per file; :mod:`.register` puts them into verl's registries."""
