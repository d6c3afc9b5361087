"""Before a run and around it: what it will take, and how it is started where."""
