"""From the arguments of a public function to something that can be launched."""
