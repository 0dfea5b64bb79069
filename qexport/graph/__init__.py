"""What is known of fx graphs: the arguments of calls by name, what nodes carry, the operators of qexport."""
