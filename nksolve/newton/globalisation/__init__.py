"""From a direction to the next point: line searches, trust regions, boxes, continuation."""
