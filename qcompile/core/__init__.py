"""The ground: the vocabulary that every part of qcompile shares. It never edits a graph."""
