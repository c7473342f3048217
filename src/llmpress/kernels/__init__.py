"""Operations worth a kernel of their own: one folder each, with a reference that states the mathematics."""
