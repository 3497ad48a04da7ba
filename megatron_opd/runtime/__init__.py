"""What every role stands on: wires, rendezvous, processes, devices."""
