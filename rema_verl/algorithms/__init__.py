"""Pure tensor functions first, registration in verl's registries second; one concept per file."""
