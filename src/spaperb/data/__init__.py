"""What cells mean: how their expression is read and checked."""
