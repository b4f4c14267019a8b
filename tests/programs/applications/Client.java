// A client as people write it in Java: PORT, then nothing, or "before" or "after"
// connect() and the seconds of idle time that it asks for.
import java.net.InetSocketAddress;
import java.net.StandardSocketOptions;
import java.nio.channels.SocketChannel;
import jdk.net.ExtendedSocketOptions;

class Client {
  public static void main(String[] words) throws Exception {
    var socket = SocketChannel.open();
    if (words.length == 3 && words[1].equals("before")) ask(socket, words[2]);
    socket.connect(new InetSocketAddress("127.0.0.1", Integer.parseInt(words[0])));
    if (words.length == 3 && words[1].equals("after")) ask(socket, words[2]);
    System.out.println("ready");
    System.in.readAllBytes();
  }

  static void ask(SocketChannel socket, String idle) throws Exception {
    socket.setOption(StandardSocketOptions.SO_KEEPALIVE, true);
    socket.setOption(ExtendedSocketOptions.TCP_KEEPIDLE, Integer.parseInt(idle));
  }
}
