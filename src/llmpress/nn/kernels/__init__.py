"""Operations worth a kernel: one folder each, with a reference that states the mathematics."""
