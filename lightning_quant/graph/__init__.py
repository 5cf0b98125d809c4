"""From a module and a call to a graph, and from a graph to a plan."""
